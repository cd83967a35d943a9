"""What `check-data` looks at: a recipe's shards, their samples, the mixture, a dataset's own files."""
