-- What GitHub's Markdown cannot say, or says by raw HTML, for pandoc's HTML and Typst:
-- figures, claims and other alerts, answers, links between chapters.
local typst = FORMAT:match("typst") ~= nil
local kinds = {note = "Note", tip = "Try it", important = "Claim", warning = "Trap", caution = "Caution"}
local classes = {note = "note", tip = "tip", important = "claim", warning = "trap", caution = "trap"}

local function is_chapter(name)
  return name:match("^%d%d%-") or name:match("^%a%-") or name == "references"
end

local function Link(link)
  if link.target:match("^%a+:") then return link end
  local file, anchor = link.target:match("^([^#]*)#?(.*)$")
  local name = file:match("^(.*)%.md$")
  local id = file == "" and anchor or nil
  if typst then
    if name and is_chapter(name) then id = anchor ~= "" and anchor or "chapter-" .. name end
    if id then
      link.target = "#" .. id
      return link
    end
  elseif id then
    return link
  elseif name and not name:match("%.%./%.%./") then
    name = name:gsub("^%.%./guide/", ""):gsub("^guide/", "")
    if name == "README" then name = "index" end
    if not name:match("^%.%./README") and not name:match("^%.%./HACKING") and not name:match("benchmarks") then
      link.target = name:gsub("^%.%./", "") .. ".html" .. (anchor ~= "" and "#" .. anchor or "")
      return link
    end
  end
  return link.content -- a file of the repository, which is not part of the book
end

local function RawInline(raw)
  if raw.format ~= "html" then return end
  local id = raw.text:match('^<a id="([^"]+)">')
  if id then return pandoc.Span({}, {id = id}) end -- Blocks turns it into a place that links can reach
  if raw.text:match("^</a>") or raw.text:match("^<!%-%-") then return {} end
end

local function anchor_of(block)
  if block and block.t == "Para" and #block.content == 1 and block.content[1].t == "Span" and #block.content[1].content == 0 then
    return block.content[1].identifier
  end
end

local function is_figure_part(block)
  return block and (block.t == "RawBlock" and block.text:match("^<!%-%- widget")
    or block.t == "Para" and #block.content == 1 and block.content[1].t == "Image")
end

local function figure_of(block, id)
  local image = block.content[1]
  local caption = image.caption
  local plain = pandoc.Image(typst and {} or pandoc.utils.stringify(caption), image.src)
  return pandoc.Figure({pandoc.Plain({plain})}, {pandoc.Plain(caption)}, {id = id or ""})
end

local function Blocks(blocks)
  local out = pandoc.Blocks({})
  local id, widget, exercise
  for index, block in ipairs(blocks) do
    local raw = block.t == "RawBlock" and block.format == "html" and block.text or ""
    local name = raw:match("^<!%-%- widget: ([%w-]+) %-%->")
    if name then
      widget = name
    elseif raw:match("^<!%-%-") then
      -- a comment
    elseif anchor_of(block) and is_figure_part(blocks[index + 1]) then
      id = anchor_of(block)
    elseif anchor_of(block) then
      local place = typst and "#metadata(none)<%s>" or '<span id="%s"></span>'
      out:insert(pandoc.RawBlock(typst and "typst" or "html", place:format(anchor_of(block))))
      local chapter, number = anchor_of(block):match("^exercise%-(%w+)%-(%d+)$")
      exercise = chapter and chapter .. "." .. number or exercise
    elseif block.t == "Para" and #block.content == 1 and block.content[1].t == "Image" then
      local figure = figure_of(block, id)
      id = nil
      if widget and not typst then
        out:insert(pandoc.RawBlock("html", '<div class="widget" data-widget="' .. widget .. '">'))
        out:insert(figure)
        out:insert(pandoc.RawBlock("html", "</div>"))
      else
        out:insert(figure)
      end
      widget = nil
    elseif typst and raw:match("^<details>") then
      out:insert(pandoc.RawBlock("typst", '#answer("' .. (exercise or "") .. '")['))
    elseif typst and raw:match("^</details>") then
      out:insert(pandoc.RawBlock("typst", "]"))
    elseif typst and raw ~= "" then
      -- a summary
    else
      out:insert(block)
    end
  end
  return out
end

local function Div(div)
  for class, title in pairs(kinds) do
    if div.classes:includes(class) then
      if div.content[1].t == "Div" and div.content[1].classes:includes("title") then table.remove(div.content, 1) end
      if typst then
        local out = pandoc.Blocks({pandoc.RawBlock("typst", '#aside("' .. classes[class] .. '")[')})
        out:extend(div.content)
        out:insert(pandoc.RawBlock("typst", "]"))
        return out
      end
      div.classes = {"aside", classes[class]}
      if class ~= "important" and class ~= "warning" then
        table.insert(div.content, 1, pandoc.Para({pandoc.Strong(title)}))
      end
      return div
    end
  end
end

local function Header(header)
  if typst and header.level == 1 then
    header.identifier = "chapter-" .. PANDOC_STATE.input_files[1]:match("([^/]+)%.md$")
  end
  return header
end

local function Span(span)
  if typst and #span.content == 0 and span.identifier ~= "" then
    return pandoc.RawInline("typst", "#metadata(none)<" .. span.identifier .. ">")
  end
end

return {{RawInline = RawInline}, {Link = Link, Header = Header, Blocks = Blocks}, {Div = Div, Span = Span}}
