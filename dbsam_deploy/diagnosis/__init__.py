"""What runs on this machine: questions put to runtimes in processes of their own."""
