"""What is kept on the local disk: sparse content, the database, the journal, and how much room they may take."""
