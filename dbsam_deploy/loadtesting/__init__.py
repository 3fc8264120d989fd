"""Load on a Triton server: requests, latencies, the server's own figures, tables, plots, a page."""
