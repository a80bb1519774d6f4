"""What runs and records: the command line, the terminal, run folders, jobs, pages."""
