"""What `videollama serve` runs: the OpenAI API's chat completions, answered by Video-LLaMA.

A request's way: `app` takes it from HTTP, `chat_request` reads and checks it; in one of a few threads `preparation`
has its media brought by `fetching`, measured by `media_limits` and turned into model inputs; `batching` puts it into a
batch with others, whose rows `answers` turns into text. `errors` is what it is refused with, `server` the process.

`transformers serve` can load the model, which this package registers, but would have to be replaced in all that is
above: it generates for one request at a time unless a model has continuous batching, which those with media have not;
has no limit on what waits; decodes media in the thread that answers HTTP; and hands every address in a request,
private ones and local paths included, to the processor, without limits of size or time.
"""
