"""Tables sharded over workers, nearest-neighbour indexes and their published snapshots."""
