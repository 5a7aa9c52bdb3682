"""What engine and workers say to each other, as messages and as bytes, and the connections that carry it."""
