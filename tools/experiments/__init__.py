"""What commands do with a workbench: recipes compared, speed measured."""
