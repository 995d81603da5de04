"""Buttons that copy a finished run to Google Drive, push it to the hub, or convert it for Ollama."""

import html
import shlex
import shutil

from peftlib import methods
from peftlib.core.errors import StudyError
from peftlib.core.files import copy_tree, readable_path
from peftlib.export.export import FORMS, Preview, export_model
from peftlib.export.gguf import MODELFILE, QUANTS
from peftlib.notebook.widgets import Action, can_click, look, of_run, off
from peftlib.report.render import plain
from peftlib.storage import remotes

_DRIVE_FOLDER = "peftlib results"  # next to the folder peftlib, which has the archives of studies


def drive_box(study, method, *, is_interactive=None):
    """Show a button (on Colab) that copies a run and the report to Google Drive as plain files."""
    if not can_click(is_interactive):
        return off("mounting Drive needs your permission", f"cp -r {readable_path(study.folder)} FOLDER")
    if not remotes.can_ask_colab():
        weights = readable_path(study.weights_dir(method, study.cfg.seed))
        print(f"Google Drive is available only on Colab; the files are in {weights}")
        return None
    return Action("Copy to my Drive", lambda say: _copied_to_drive(study, method, say))


def _copied_to_drive(study, method, say):
    say("copying")
    drive = remotes.DRIVE / "MyDrive"
    if not drive.is_dir():
        remotes.mount_drive()
    if not drive.is_dir():
        raise StudyError(
            f"Drive is not mounted: run drive.mount({str(remotes.DRIVE)!r}) in a cell, then press the button again"
        )
    to, weights = drive / _DRIVE_FOLDER / study.folder.name, study.weights_dir(method, study.cfg.seed)
    if not weights.is_dir():
        raise StudyError(f"no weights of {method} yet: run the training cell first")
    copy_tree(weights, to / weights.name, dirs_exist_ok=True)
    record = study.record_path(method, study.cfg.seed)
    files = [record, study.results_path, study.report_path, study.folder / "report.html"]
    files = [path for path in files if path.is_file()]
    for path in files:
        shutil.copyfile(path, to / path.name)
    say("Copied. Keep this runtime for a few minutes: Colab uploads in the background.")
    names = ", ".join([weights.name, *(path.name for path in files)])
    return f"<p>In My Drive, folder {html.escape(f'{_DRIVE_FOLDER}/{to.name}: {names}')}.</p>"


def hub_box(study, method, *, is_interactive=None, api=None):
    """Show a preview of a push to the hub on request, and then a button that pushes exactly that.

    api: a huggingface_hub.HfApi; None creates one with the token of hub_token when the push starts.
    """
    if can_click(is_interactive):
        return HubBox(study, method, api)
    command = f"peftlib export {method} {of_run(study)} --to hf://USER/REPO"
    return off("a push needs a click", command)


class HubBox(Action):
    """Widgets of one push; a preview of the current settings enables the button `push`."""

    def __init__(self, study, method, api=None):
        import ipywidgets as w

        self._run, self._api = (study, method), api
        form = FORMS[0] if "adapters" in methods.find(method).trains else "merged"
        hint = {"placeholder": "your-name/model-name", "continuous_update": False}
        self.to = w.Text(description="repository", **hint, **look("25rem", "6rem"))
        self.form = w.Dropdown(options=FORMS, value=form, description="form", **look("14rem", "4rem"))
        self.private = w.Checkbox(value=True, description="private", indent=False, layout={"width": "auto"})
        self.push = w.Button(description="Push to the hub", disabled=True, layout={"align_self": "flex-start"})
        super().__init__("Preview", self._preview, [self.to, self.form, self.private])
        self.box.children = [*self.box.children, self.push]
        self.push.on_click(lambda _: self.do(self._push))
        for control in (self.to, self.form, self.private):
            control.observe(self._forget, "value")

    def _forget(self, change=None):
        self.push.disabled, self.shown.value = True, ""

    def _how(self):
        private, to = self.private.value, f"hf://{self.to.value.strip()}"
        return {"to": to, "form": self.form.value, "private": private, "seed": self._run[0].cfg.seed}

    def _preview(self, say):
        if not self.to.value.strip():
            say("Type a repository first, such as your-name/model-name.")
            return ""
        say("preparing the files (nothing is uploaded)")
        how = self._how()
        found = Preview(*self._run, **how)
        self.push.disabled = not found.is_finished
        say("Nothing has been uploaded yet." if found.is_finished else "")
        who = "private: only you can read it" if how["private"] else "PUBLIC: anyone can read it"
        return f"<p>{html.escape(how['to'])}, {who}.</p>{found._repr_html_()}"

    def _push(self, say):
        say("uploading")
        made = export_model(*self._run, **self._how(), api=self._api, log=say)
        say("Pushed.")
        self.push.disabled = True
        return f'<p><a href="{html.escape(made.address)}">{html.escape(made.address)}</a></p>'


def gguf_box(study, method, *, is_interactive=None):
    """Show a button that makes a GGUF file with a Modelfile, and then the commands to run it in Ollama."""
    if not can_click(is_interactive):
        command = f"peftlib export {method} {of_run(study)} --form gguf --to FOLDER"
        return off("it takes minutes and writes a file as large as the model", command)
    import ipywidgets as w

    quant = w.Dropdown(options=QUANTS, description="type", **look("12rem", "4rem"))
    return Action("Make GGUF for Ollama", lambda say: _made_gguf(study, method, quant.value, say), [quant])


def _made_gguf(study, method, quant, say):
    say("merging and converting")
    to = study.folder / "export" / f"{method}-s{study.cfg.seed}-gguf-{quant}"
    export_model(study, method, seed=study.cfg.seed, to=to, form="gguf", quant=quant, log=say)
    say("Made.")
    name = f"{study.folder.name}-{method}".lower()
    return plain(f"{shlex.join(['ollama', 'create', name, '-f', str(to / MODELFILE)])}\nollama run {name}")
