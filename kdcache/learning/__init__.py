"""What knows about samples and networks: datasets, views, models, losses."""
