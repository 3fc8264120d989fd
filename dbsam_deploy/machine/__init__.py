"""The machine and its processes: what it is, what it may tell, Pythons of their own."""
