"""report.html: the record of runs as one page."""
