"""What a run leaves behind: files, tables and figures."""
