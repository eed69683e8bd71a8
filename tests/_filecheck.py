"""Match a text against the CHECK comments of a test function."""

import contextlib
import inspect
from collections.abc import Callable
from io import StringIO

from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts


def filecheck(text: str, test: Callable[..., object]) -> None:
    """Fail with the package's own message when the text does not follow the comments in the source of ``test``."""
    options = Options(match_filename=test.__name__)
    parser = Parser(options, StringIO(inspect.getsource(test)), *pattern_for_opts(options))
    said = StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = Matcher(options, FInput(test.__name__, text), parser).run()
    assert status == 0, f"{said.getvalue()}\n{text}"
