"""What a run is: the typed schema, the loader, the run files themselves, and the errors every room may raise."""
