"""What happens to one frame, from Dynamo to a callable; dry runs, what is kept and told of it."""
