"""Plans made explicit for one model: places named, layouts stated, and the tensor steps that they come to.

`resolve_plan` needs torch and Transformers, once; what it gives is carried out without either. A program that
converts files uses it so:

```python
if plan.resolved is None:
    from rewire.explicit import resolve_plan  # here, not at the top: it imports torch

    plan = resolve_plan(plan, folder)
rule = plan.resolved.rule  # from the tensors in the files to those of the edited layout
before = invert(rule)  # the way back; bit for bit where nothing was dropped or narrowed
```

`written_rule` gives the same rule for a folder that `rewire.save(model, folder, layout="edited")` wrote.
"""

from rewire.explicit.plans import resolve_plan, written_rule

__all__ = ["resolve_plan", "written_rule"]
