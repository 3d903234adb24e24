"""Features of test sets, rankings, numbers, pictures."""
