"""What knows about files: atomic writes, the block ledger, the Zarr backend, the reader. No torch."""
