"""What is saved, where, and how it is restored."""
