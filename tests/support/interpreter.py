# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without what it does again and again: half of its time."""

import inspect


def spare_repetitions() -> None:
    """Patch `triton.language` once per launch, not again for each call of a function of the kernel, and look numpy's
    types up instead of listing them all each time. A triton that names these things differently stays slow."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not {"tl", "_patch_lang", "_LangPatchScope", "_get_np_dtype"} <= vars(interpreter).keys():
        return
    tl, patch, numpy_type = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    languages, patched, types = {}, set(), {}

    def patch_lang(fn):
        if fn not in languages:
            found = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            languages[fn] = frozenset(module.__name__ for module in found if module in (tl, tl.core))
        if languages[fn] in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(languages[fn])
        scope = patch(fn)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = numpy_type(dtype)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype
