"""Where samples come from: one module for each kind of dataset spec. A source knows nothing of caches, views and networks."""
