"""The contract of prepared data, and the feed that turns it into batches."""
