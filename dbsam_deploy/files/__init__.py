"""How this library writes a file and knows one again: whole, hashed, described, checked."""
