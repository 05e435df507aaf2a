"""Completion scripts for bash, zsh and fish, made from the parser and the job's keys."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from meshwright.cli.parser import build_parser
from meshwright.errors import InputError, Problem
from meshwright.job import job_keys


@dataclass(frozen=True)
class _Verb:
    """What may follow a verb: (flag, help), fixed words, and whether overrides such as `train.lr=` follow the job."""

    name: str
    summary: str
    flags: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    takes_overrides: bool


def script(shell: str) -> str:
    """The completion script of `shell`: "bash", "zsh" or "fish"."""
    writers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in writers:
        raise InputError(Problem("completion", f"no script for '{shell}'", "known: " + ", ".join(writers)))
    return writers[shell](_verbs())


def _verbs() -> list[_Verb]:
    parser, verbs = build_parser()
    summaries = {
        choice.dest: choice.help or ""
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    result = []
    for name, verb in verbs.items():
        flags = tuple((flag, action.help or "") for action in verb._actions for flag in action.option_strings)
        words = tuple(str(choice) for action in verb._actions for choice in action.choices or ())
        takes = any(action.dest in ("overrides", "words") for action in verb._actions)
        result.append(_Verb(name, summaries[name], flags, words, takes))
    return result


def _overrides(section: str = "") -> str:
    return " ".join(f"{key}=" for key in job_keys() if key.startswith(section))


_BASH = """\
# meshwright completion for bash. Load it now and from now on:
#   meshwright completion bash > ~/.meshwright-completion && echo '. ~/.meshwright-completion' >> ~/.bashrc
_meshwright() {
  local current=${COMP_WORDS[COMP_CWORD]} flags= words=
  local keys='%(keys)s'
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='%(verbs)s'
  else
    case ${COMP_WORDS[1]} in
%(cases)s
    esac
    case $current in -*) words=$flags ;; *) [ -f "$current" ] && words= ;; esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case ${COMPREPLY[0]-} in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _meshwright meshwright
"""


def _bash(verbs: list[_Verb]) -> str:
    cases = []
    for verb in verbs:
        flags = " ".join(flag for flag, _ in verb.flags)
        words = f"words='{' '.join(verb.words)}'" if verb.words else "words="
        if verb.takes_overrides:  # after the job file, which bash completes by itself
            words = '[ "$COMP_CWORD" -gt 2 ] && words=$keys'
        cases.append(f"      {verb.name}) flags='{flags}'; {words} ;;")
    named = " ".join(verb.name for verb in verbs)
    return _BASH % {"verbs": named, "keys": _overrides(), "cases": "\n".join(cases)}


_ZSH = """\
#compdef meshwright
# meshwright completion for zsh. Write it to a folder of $fpath:
#   meshwright completion zsh > ~/.zfunc/_meshwright      (with fpath+=~/.zfunc before compinit in ~/.zshrc)
_meshwright() {
  local -a verbs flags choices keys
  keys=(%(keys)s)
  verbs=(
%(verbs)s
  )
  if (( CURRENT == 2 )); then
    _describe 'verb' verbs
    return
  fi
  case $words[2] in
%(cases)s
  esac
  if [[ $PREFIX == -* ]]; then
    compadd -- $flags
  elif (( CURRENT == 3 )); then
    compadd -- $choices
    _files
  else
    compadd -S '' -- $keys
    _files
  fi
}
compdef _meshwright meshwright
"""


def _zsh(verbs: list[_Verb]) -> str:
    described = "\n".join(f"    {_quoted(verb.name + ':' + verb.summary)}" for verb in verbs)
    cases = "\n".join(
        f"    {verb.name}) flags=({' '.join(flag for flag, _ in verb.flags)}); choices=({' '.join(verb.words)})"
        + (" ;;" if verb.takes_overrides else "; keys=() ;;")
        for verb in verbs
    )
    return _ZSH % {"verbs": described, "keys": _overrides(), "cases": cases}


def _fish(verbs: list[_Verb]) -> str:
    lines = [
        "# meshwright completion for fish:",
        "#   meshwright completion fish > ~/.config/fish/completions/meshwright.fish",
    ]
    for verb in verbs:
        lines.append(f"complete -c meshwright -n __fish_use_subcommand -f -a {verb.name} -d {_quoted(verb.summary)}")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        for flag, meaning in verb.flags:
            option = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            lines.append(f"complete -c meshwright {seen} {option} -d {_quoted(meaning)}")
        if verb.words:
            lines.append(f"complete -c meshwright {seen} -f -a '{' '.join(verb.words)}'")
        if verb.takes_overrides:
            section = "serve." if verb.name == "serve" else ""
            lines.append(f"complete -c meshwright {seen} -a '{_overrides(section)}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
