"""What a sweep found: a table, tables as CSV and JSON, a picture, and one HTML page."""
