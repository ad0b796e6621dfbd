"""Files that are part of the package."""
