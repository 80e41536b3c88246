"""What a running server is doing, read from its metrics: for the terminal and for the web page."""
