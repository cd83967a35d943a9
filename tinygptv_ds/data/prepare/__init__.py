"""What stands behind ``prepare``: pictures, one shard from its entries, processes, the output folder, the report."""
