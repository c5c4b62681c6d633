"""What a person sees of data: the lint of raw files, and the page of samples."""
