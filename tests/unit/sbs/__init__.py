"""What sbs refuses, decides by the graph, and writes to disk."""
