"""What comes out of a run: the directories and files that other libraries read and write."""
