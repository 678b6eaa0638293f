"""Processes: the command line, Ray jobs and the order of the stages."""
