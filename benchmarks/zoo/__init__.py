"""The zoo: the networks of ``docs/models.md`` (``networks``), what is checked on each (``checks``) and the page (``page``)."""
