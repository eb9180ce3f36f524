"""Photo folders to training samples."""
