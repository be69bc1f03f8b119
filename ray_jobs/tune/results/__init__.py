"""What came out of a search."""
