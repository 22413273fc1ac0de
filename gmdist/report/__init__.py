"""What a person looks at: the HTML page of a run."""
