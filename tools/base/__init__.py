"""What every room needs: errors, files, options, the console, words."""
