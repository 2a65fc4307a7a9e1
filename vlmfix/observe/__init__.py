"""Lets a model answer and records what happens inside it meanwhile. Nothing here changes a model or an answer.

- ``prompts``: from a question and an image to a model's inputs.
- ``ask``: the model answers them, greedily or along a given answer; or reads them once and says what comes next.
- ``words``: which tokens of a prompt are the image's, which of an answer spell an object, or yes and no.
- ``watch``: what can be recorded: attention weights, head outputs, what enters a layer.
- ``samples``: images and questions whose answer, or whose objects, are known.

Probes, calibration, the evaluation's runs and ``vlmfix inspect`` all ask by this road:

>>> inputs = encode(processor, [PromptBuilder(processor)("Is there a dog?")], [picture], model)  # doctest: +SKIP
>>> answer(model, inputs, max_new_tokens=32).words  # doctest: +SKIP

A recorder is a method that edits nothing, so that it sees what the methods of a patch do. To add one, write a class in
``watch`` that hands what its hook is given to a function. ``Subject.answer(inputs, AttentionWatch(log.see))`` puts it
beside the patch for one answer.
"""
