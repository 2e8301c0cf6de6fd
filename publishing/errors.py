"""The errors of publishing: each says what is wrong and what to do."""


class PublishingError(RuntimeError):
    """The checkpoint cannot be published as it is, or the Hub refused it. The message is one line."""


class FreshProcessError(PublishingError):
    """A script failed in a fresh process.

    Args:
        summary: What failed, in one line.
        stderr: What the process wrote to its standard error; its last lines are part of the message.
        returncode: Exit status of the process, `None` if it was stopped for taking too long.
    """

    def __init__(self, summary: str, stderr: str = "", returncode: int | None = None):
        self.summary = summary
        self.stderr = stderr
        self.returncode = returncode
        tail = "\n".join(stderr.strip().splitlines()[-15:])
        super().__init__(f"{summary}\n{tail}" if tail else summary)
