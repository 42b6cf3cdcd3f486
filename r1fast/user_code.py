"""Functions of the user's, by `package.module.function` or `path/to/file.py:function`."""

import importlib.util
import pkgutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1fast.wording import did_you_mean, one_line


def load_function(what: str, name: str) -> Callable[..., Any]:
    """The function of that name; ValueError, which begins with what it is for and its name."""
    where = f"{what} {name!r}"
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        function = _from_file(where, Path(path).expanduser(), attribute)
    else:
        try:
            function = pkgutil.resolve_name(name)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{where} cannot be imported: {one_line(error)}; expected 'package.module.function' "
                "with the package on PYTHONPATH, or 'path/to/file.py:function'"
            ) from error
    if not callable(function):
        raise ValueError(f"{where} is a {type(function).__name__}, expected a function")
    return function


def _from_file(where: str, path: Path, attribute: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{where}: no file {str(path)!r} (working directory {Path.cwd()})")
    # One module per file, so that two functions of one file share its state and its classes.
    module_name = f"r1fast_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None, f"{path=}"
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a script may end with sys.exit(main())
            del sys.modules[module_name]
            raise ValueError(f"{where}: importing {path} raised {one_line(error)}") from error
    module = sys.modules[module_name]
    if not hasattr(module, attribute):
        raise ValueError(f"{where}: {path} has no {attribute!r}{did_you_mean(attribute, vars(module))}")
    return getattr(module, attribute)
