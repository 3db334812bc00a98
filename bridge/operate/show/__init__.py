"""What commands print: pages for a terminal of any width and encoding, and JSON."""
