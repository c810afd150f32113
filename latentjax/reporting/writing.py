"""Writing a report: the page, its recipes and its pictures, in one directory."""

from collections.abc import Callable
from pathlib import Path

from latentjax.errors import UserError
from latentjax.reporting import figures, recipes
from latentjax.reporting.page import Pictures, page
from latentjax.reporting.results import Results
from latentjax.training.run_directory import write_whole

PAGE = "index.html"


def check_output(directory: Path) -> None:
    """Checks that a report may be written there: to a directory that is new, empty, or holds a report.

    Raises:
      UserError: it may not.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / PAGE).is_file():
        raise UserError(
            f"--output {directory} holds something else than a report: give a directory that is new, empty, or of an "
            "earlier report"
        )


def write_report(results: Results, directory: Path, note: Callable[[str], None]) -> Path:
    """Draws and writes; what an earlier report has left there under the same names is replaced.

    Returns:
      The page's file.

    Raises:
      UserError: matplotlib is missing, or the directory cannot be written.
    """
    figures.check_matplotlib()
    check_output(directory)
    note(f"drawing {len(results.runs)} runs ...")
    settings = results.settings
    seen = figures.views(settings)
    pictures = Pictures(
        held_out=[figures.loss_figure(settings, view, held_out=True) for view in seen],
        training=[figures.loss_figure(settings, view, held_out=False) for view in seen],
        passes=figures.pass_figures(settings),
        residual=figures.residual_figure(settings),
    )
    text = page(results, pictures)
    try:
        (directory / "recipes").mkdir(parents=True, exist_ok=True)
        for setting, name in zip(settings, recipes.recipe_names(settings), strict=True):
            write_whole(directory / "recipes" / name, recipes.recipe_text(setting))
        for figure in pictures.all():
            (directory / f"{figure.name}.png").write_bytes(figure.png)
        write_whole(directory / PAGE, text)
    except OSError as error:
        raise UserError(f"cannot write to --output {directory}: {error.strerror or error}") from error
    return directory / PAGE
