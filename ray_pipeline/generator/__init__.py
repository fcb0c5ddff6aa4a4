"""When each rating is due, and the loop that sends it: rate plan, shard, runner, worker."""
