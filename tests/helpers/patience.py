"""How long a test waits for a state that a busy machine reaches late, before it takes a process for hung."""

PATIENCE = 300.0  # seconds; on an idle machine no test comes near it
