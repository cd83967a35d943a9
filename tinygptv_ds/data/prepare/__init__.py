"""What stands behind ``prepare``: images, one shard from its entries, processes, the output folder, the report."""
