"""What is judged of what is known: how urgent it is, what to do, what not to do."""
