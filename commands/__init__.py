"""What `anyvlm` can be told to do, a module for each command.

Nothing heavy is imported before a command runs, so that help comes at once.
"""
