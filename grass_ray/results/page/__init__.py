"""The leaderboard as one page of HTML."""
