"""The prompts of the published chat as Jinja chat templates, one for each family of decoders.

`VideoLlamaProcessor.apply_chat_template` renders them and saves them as `chat_template.jinja`, from where a tokenizer
or a server renders them as well: a template needs nothing but the library's messages. The wording, its runs of spaces
included, is what the published checkpoints were trained and shown with; the rules for everything the published chat
has no words for are in the docstring of `VideoLlamaProcessor.apply_chat_template`.

An entry of type "video" may carry two notes, which the processor writes after opening the file: `has_audio` (its own
sound gets a placeholder before it) and `timestamps` (list of seconds of the frames shown, for a video without sound).
"""

# The words of one message: a plain string as it is, entries joined by single spaces, media in the published sentences.
# A sound belongs to the video beside it (the one after it, else the one before it) and is heard before it is seen.
_WORDS = """
{%- macro words(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- elif message['content'] -%}
    {%- set image = '<Image>' ~ (image_token or '<image>') ~ '</Image>' -%}
    {%- set video = '<Video>' ~ (video_token or '<video>') ~ '</Video>' -%}
    {%- set hear = 'Close your eyes, open your ears and you imagine only based on the sound that: ' ~ (audio_token or '<audio>') ~ '.' -%}
    {%- set see = 'Close your ears, open your eyes and you see that ' ~ video ~ '.' -%}
    {%- set ns = namespace(media='', text='', sound=false, sight=false, before=false, after=false) -%}
    {%- for entry in message['content'] -%}
      {%- set now = namespace(media='') -%}
      {%- if entry['type'] == 'text' -%}
        {%- if entry['text'] -%}
          {%- set ns.text = ns.text ~ (' ' if ns.media or ns.text else '') ~ entry['text'] -%}
        {%- endif -%}
      {%- elif entry['type'] == 'image' -%}
        {%- set ns.sight = true -%}
        {%- set now.media = image ~ ' ' -%}
      {%- elif entry['type'] == 'audio' -%}
        {%- set ns.sound = true -%}
        {%- if ns.after -%}
          {%- set ns.after = false -%}
        {%- elif loop.nextitem and loop.nextitem['type'] == 'video' and not loop.nextitem['has_audio'] -%}
          {%- set ns.before = true -%}
        {%- else -%}
          {%- set now.media = hear -%}
        {%- endif -%}
      {%- elif entry['type'] == 'video' -%}
        {%- set ns.sight = true -%}
        {%- if entry['has_audio'] or ns.before -%}
          {%- set ns.sound = true -%}
          {%- set ns.before = false -%}
          {%- set now.media = hear ~ ' ' * 17 ~ see -%}
        {%- elif loop.nextitem and loop.nextitem['type'] == 'audio' -%}
          {%- set ns.after = true -%}
          {%- set now.media = hear ~ ' ' * 17 ~ see -%}
        {%- elif entry['timestamps'] -%}
          {%- set now.media = video ~ ' The video contains ' ~ entry['timestamps'] | length ~ ' frames sampled at ' ~ entry['timestamps'] | join(', ') ~ ' seconds. ' -%}
        {%- else -%}
          {%- set now.media = video ~ ' ' -%}
        {%- endif -%}
      {%- else -%}
        {{- raise_exception('a content entry has type "' ~ entry['type'] ~ '"; expected text, image, video or audio') -}}
      {%- endif -%}
      {%- if now.media -%}
        {%- set ns.media = ns.media ~ ns.text ~ (' ' if ns.media or ns.text else '') ~ now.media -%}
        {%- set ns.text = '' -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if ns.sound -%}
      {%- set ns.media = ns.media ~ ' ' * 18 ~ 'Now answer my question based on what you have just ' ~ ('seen and ' if ns.sight else '') ~ 'heard.' -%}
    {%- endif -%}
    {{- ns.media ~ ns.text -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro refuse_role(message) -%}
  {{- raise_exception('a message has role "' ~ message['role'] ~ '"; expected user or assistant, and system for the first message only') -}}
{%- endmacro -%}
""".strip()

_VICUNA = """
{%- if not messages or messages[0]['role'] != 'system' -%}
  {{- '###' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'Human: ' ~ words(message) ~ '###' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'Assistant: ' -}}
    {%- generation -%}
      {{- words(message) ~ '###' -}}
    {%- endgeneration -%}
  {%- elif message['role'] == 'system' and loop.first -%}
    {{- words(message) ~ '###' -}}
  {%- else -%}
    {{- refuse_role(message) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'Assistant:' -}}
{%- endif -%}
""".strip()

_LLAMA_2 = """
{%- set chat = namespace(system='', started=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- if chat.started -%}
      {{- bos_token ~ '[INST] ' -}}
    {%- else -%}
      {{- '[INST] <<SYS>>\\n' ~ chat.system ~ '\\n<</SYS>>\\n\\n' -}}
      {%- set chat.started = true -%}
    {%- endif -%}
    {{- words(message) ~ ' [/INST]' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' -}}
    {%- generation -%}
      {{- words(message) ~ ' ' ~ eos_token -}}
    {%- endgeneration -%}
  {%- elif message['role'] == 'system' and loop.first -%}
    {%- set chat.system = words(message) -%}
  {%- else -%}
    {{- refuse_role(message) -}}
  {%- endif -%}
{%- endfor -%}
""".strip()

# A base decoder knows no roles: soft tokens, text, end of line. Text that a generation starts from has no end yet.
_PLAIN = """
{%- set placeholders = {'image': image_token or '<image>', 'video': video_token or '<video>', 'audio': audio_token or '<audio>'} -%}
{%- for message in messages -%}
  {%- set ns = namespace(text='', ended=true) -%}
  {%- if message['content'] is string -%}
    {%- set ns.text = message['content'] -%}
    {%- set ns.ended = false -%}
  {%- elif message['content'] -%}
    {%- for entry in message['content'] -%}
      {%- if entry['type'] == 'text' -%}
        {%- set ns.text = ns.text ~ ('' if ns.ended else ' ') ~ entry['text'] -%}
        {%- set ns.ended = false -%}
      {%- elif entry['type'] in placeholders -%}
        {%- set ns.text = ns.text ~ (placeholders['audio'] if entry['has_audio'] else '') ~ placeholders[entry['type']] -%}
        {%- set ns.ended = true -%}
      {%- else -%}
        {{- raise_exception('a content entry has type "' ~ entry['type'] ~ '"; expected text, image, video or audio') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if not ns.ended and not (loop.last and add_generation_prompt) -%}
    {%- set ns.text = ns.text ~ '\\n' -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- ns.text -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- ns.text -}}
  {%- endif -%}
{%- endfor -%}
""".strip()

# SmolLM2-Instruct's own template, word for word where a chat has no media. Media stand in the user's turn, sound
# before sight, without words around them; a chat with media needs no system prompt.
_SMOLLM2 = """
{%- set placeholders = {'image': image_token or '<image>', 'video': video_token or '<video>', 'audio': audio_token or '<audio>'} -%}
{%- set chat = namespace(media=false) -%}
{%- for message in messages -%}
  {%- if message['content'] and message['content'] is not string -%}
    {%- for entry in message['content'] -%}
      {%- if entry['type'] in placeholders -%}
        {%- set chat.media = true -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if messages and messages[0]['role'] != 'system' and not chat.media -%}
  {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set ns = namespace(text='', sounds='', sights='') -%}
  {%- if message['content'] is string -%}
    {%- set ns.text = message['content'] -%}
  {%- elif message['content'] -%}
    {%- for entry in message['content'] -%}
      {%- if entry['type'] == 'text' -%}
        {%- set ns.text = ns.text ~ (' ' if ns.text else '') ~ entry['text'] -%}
      {%- elif entry['type'] == 'audio' -%}
        {%- set ns.sounds = ns.sounds ~ placeholders['audio'] -%}
      {%- elif entry['type'] in placeholders -%}
        {%- set ns.sounds = ns.sounds ~ (placeholders['audio'] if entry['has_audio'] else '') -%}
        {%- set ns.sights = ns.sights ~ placeholders[entry['type']] -%}
      {%- else -%}
        {{- raise_exception('a content entry has type "' ~ entry['type'] ~ '"; expected text, image, video or audio') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- ns.text ~ '<|im_end|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- ns.sounds ~ ns.sights ~ ns.text ~ '<|im_end|>' -}}
  {%- endif -%}
  {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()

CHAT_TEMPLATES: dict[str, str] = {
    "vicuna": _WORDS + _VICUNA,
    "llama_2": _WORDS + _LLAMA_2,
    "smollm2": _SMOLLM2,
    "plain": _PLAIN,
}
"""Chat template of each decoder family: Vicuna and its kin (`###Human: … ###Assistant: …###`), LLaMA-2-Chat
(`[INST] … [/INST] … </s>`), SmolLM2-Instruct (`<|im_start|>user … <|im_end|>`), and base decoders (soft tokens, text,
end of line). The first two are the published ones."""

STOP_STRINGS: dict[str, str | None] = {"vicuna": "###", "llama_2": None, "smollm2": None, "plain": "\n"}
"""What ends an answer of each family beside the tokenizer's end-of-sequence token; None: that token alone."""
