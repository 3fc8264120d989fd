// The page: what the user opens, marks and saves. `app` holds it all.

import { download, dropped, gzip, meant, named, nameOf, packed, stemOf } from "./files.js";
import { listenToKeys, listenToPointer } from "./input.js";
import { Scene } from "./scene.js";
import { Server, ServerError } from "./server.js";

const $ = (id) => document.getElementById(id);
const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`);
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const inkOn = ([r, g, b]) => (0.3 * r + 0.6 * g + 0.1 * b < 100 ? "#fff" : "#000");

class App {
  constructor() {
    this.server = new Server((wasWrong) => this.askKey(wasWrong));
    this.scene = new Scene($("canvas"), $("overlay"));
    this.study = null;
    this.tool = "move";
    this.work = Promise.resolve();
    this.waiting = 0;
    this.isUnsaved = false;
  }

  async start() {
    this.listen();
    try {
      await this.scene.start();
    } catch (error) {
      this.say(`This browser shows no WebGL 2, which the images need (${error.message}).`);
      return;
    }
    this.scene.nv.onLocationChange = () => this.showSlice();
    this.scene.onSlice = () => this.showSlice();
    await this.queue("Asking the server", async () => {
      const about = await this.server.ask("study/about", null, { method: "GET" });
      this.about = await about.json();
      this.colours = this.about.colours;
      $("model").textContent = this.about.model;
      $("answer").textContent = this.about.note && this.about.weights.trained === false ? "untrained weights" : "";
      if (this.about.window) $("window").options[0].textContent = `the server's (${this.about.window.join(", ")})`;
      this.fillAbout();
    });
  }

  // one thing after another

  /** Do something that asks the server after what is being done; errors are shown. */
  queue(text, action) {
    this.waiting += 1;
    this.showBusy(text);
    this.work = this.work.then(action).catch((error) => this.failed(error)).finally(() => {
      this.waiting -= 1;
      if (!this.waiting) this.showBusy("");
    });
    return this.work;
  }

  failed(error) {
    if (!(error instanceof ServerError)) console.error(error);
    const files = this.opening ?? this.study?.files ?? [];
    const text = error.name === "NotReadableError" || error.name === "NotFoundError"
      ? "The file cannot be read any more: was it moved or changed? Open it again."
      : named(error.message, files);
    if (!this.chooseSeries(text)) this.say(text);
  }

  /** Ask; a slot that was lost is taken anew, with the image and its masks unless others follow. */
  async asking(ask, restores = true) {
    try {
      return await ask();
    } catch (error) {
      if (error.status !== 410) throw error;
    }
    await this.server.claim();
    if (restores && this.study) await this.restore();
    return ask();
  }

  /** Bring image and masks to a server that has them no more. */
  async restore() {
    await this.upload(this.study.files, this.study);
    const masks = this.scene.masks();
    if (masks.some(Boolean)) await this.server.ask("study/masks", await gzip(masks));
    this.study.labels.forEach((label) => { label.steps = []; });
    this.showLabels();
    this.note("the server had let go of the image: opened anew, masks kept");
  }

  // opening

  open(files, { window = null, series = null } = {}) {
    const chosen = meant(files);
    if (!chosen.length) return this.say("There is no file in what you chose.");
    const isSame = this.study?.files === files;
    if (!isSame && this.isUnsaved && !confirm("Masks were not saved. Open another image?")) return null;
    this.opening = chosen;
    return this.queue("Opening", async () => {
      const { token } = this.server;
      if (!token) await this.server.claim();
      const masks = isSame ? this.scene.masks() : null;
      const study = { files: isSame ? files : chosen, window, series: isSame ? this.study.series : series };
      const info = await this.asking(() => this.upload(study.files, study), false).catch((error) => {
        if (this.server.token !== token) this.server.release(); // a new slot, without the image before
        throw error;
      });
      const pixels = await (await this.server.ask("study/pixels")).arrayBuffer();
      await this.show(study, info, pixels, isSame);
      if (masks?.some(Boolean)) {
        await this.server.ask("study/masks", await gzip(masks));
        this.scene.takeMasks(masks);
      }
      this.showLabels();
    });
  }

  async upload(files, { window, series }) {
    const answer = await this.server.ask("study/open", packed(files, { window, series }));
    return answer.json();
  }

  async show(study, info, pixels, isSame) {
    const { labels, active } = this.study ?? {};
    const before = isSame ? { labels, active, view: this.scene.view, place: this.scene.place } : null;
    this.corner = null;
    this.study = { ...study, info, name: nameOf(study.files), labels: before?.labels ?? [], active: before?.active ?? 0 };
    await this.scene.open(pixels);
    if (before) {
      this.scene.setView(before.view);
      this.scene.place = before.place;
      this.study.labels.forEach((label) => { label.steps = []; });
    } else {
      this.isUnsaved = false;
      if (study.window === null) $("window").value = "";
      this.addLabel();
    }
    $("welcome").hidden = true;
    for (const id of ["tools", "labels-box", "view-box", "save-box"]) $(id).disabled = false;
    $("image-name").textContent = `${this.study.name} · ${info.shape.toReversed().slice(0, this.scene.isVolume ? 3 : 2).join("×")}`;
    $("values").textContent = [`Grey values: ${info.values}.`, ...info.notes.map((one) => named(one, study.files))].join(" ");
    $("through").parentElement.hidden = !this.scene.isVolume;
    $("view-row").hidden = !this.scene.isVolume;
    $("window-row").hidden = info.kind === "picture";
    fill($("format"), Object.keys(info.formats).map((name) => [name, FORMAT_NAMES[name]]));
    fill($("view"), this.scene.views.map((name) => [name, VIEW_NAMES[name]]));
    $("view").value = this.scene.view;
    this.say("");
    this.note(`opened in ${seconds(info.seconds)}`);
    if (this.tool === "move") this.setTool("box");
    this.showSlice();
  }

  chooseSeries(text) {
    const lines = text.split("\n");
    if (!/DICOM series: choose/.test(lines[0]) || lines.length < 3) return false;
    const files = this.opening;
    $("series-list").replaceChildren(...lines.slice(1).map((line) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.textContent = line.replace(/ · UID .*/, "");
      button.onclick = () => {
        $("series-dialog").close();
        this.open(files, { series: /UID (\S+)/.exec(line)?.[1] });
      };
      item.append(button);
      return item;
    }));
    $("series-dialog").showModal();
    return true;
  }

  // marks

  get label() {
    return this.study?.labels[this.study.active];
  }

  mark(fields, shown) {
    const label = this.label;
    if (!label) return;
    const through = this.scene.isVolume && $("through").checked;
    this.queue("Segmenting", async () => {
      await this.change("mark", { ...fields, label: label.number, through });
      label.steps.push(shown);
      this.isUnsaved = true;
      this.showLabels();
    }).finally(() => this.showMarks());
  }

  undo() {
    const label = this.label;
    if (!label) return;
    this.queue("Taking back", async () => {
      if (await this.change("undo", { label: label.number })) label.steps.pop();
      else this.note("nothing to take back: one step is kept for each label");
      this.showLabels();
    });
  }

  clear() {
    const label = this.label;
    if (!label) return;
    this.queue("Clearing", async () => {
      await this.change("clear", { label: label.number });
      this.scene.erase(label.number);
      label.steps = [];
      this.showLabels();
    });
  }

  /** Ask for a change of one label, and draw it. */
  async change(name, fields) {
    const start = performance.now();
    const answer = await this.asking(() => this.server.json(`study/${name}`, fields));
    const meta = JSON.parse(answer.headers.get("X-Meta"));
    const voxels = new Uint8Array(await answer.arrayBuffer());
    if (meta.box) this.scene.write(meta.box, voxels, fields.label);
    const [first, end] = meta.box?.[0] ?? [0, 0];
    const where = end - first > 1 ? `slices ${first + 1}–${end} changed; ` : "";
    const late = meta.is_late ? "stopped for time, the next prompt goes on; " : "";
    const shown = seconds((performance.now() - start) / 1000);
    this.note(`${where}${late}answer in ${seconds(meta.seconds)}, shown in ${shown}`);
    return meta.has_run;
  }

  drawBox(box, across) {
    const inside = { include_interaction: true };
    this.mark({ bbox_coords: box, ...inside }, { box, across });
  }

  drawPoint(point, isInside) {
    this.mark({ coordinates: point, include_interaction: isInside }, { point, isInside });
  }

  // labels

  addLabel() {
    const { labels } = this.study;
    if (labels.length >= this.colours.length) {
      this.say(`There are ${labels.length} labels, as many as there are colours that everyone can tell apart.`);
      return;
    }
    labels.push({ number: labels.length + 1, name: `object ${labels.length + 1}`, isShown: true, steps: [] });
    this.choose(labels.length - 1);
  }

  choose(index) {
    if (!this.study?.labels[index]) return;
    this.study.active = index;
    this.showLabels();
  }

  showLabels() {
    const { labels, active } = this.study;
    this.scene.setColours(this.colours.map((colour, n) => (labels[n]?.isShown && !this.isHidden ? colour : null)));
    const { counts } = this.scene;
    $("labels").replaceChildren(...labels.map((label, index) => this.labelRow(label, index, index === active, counts[index])));
    $("new-label").disabled = labels.length >= this.colours.length;
    $("undo").disabled = !this.label.steps.length;
    this.showMarks();
  }

  labelRow(label, index, isActive, count) {
    const row = document.createElement("li");
    row.className = isActive ? "active" : "";
    const pick = document.createElement("button");
    pick.className = "pick";
    pick.textContent = label.number;
    pick.style.background = css(this.colours[index]);
    pick.style.color = inkOn(this.colours[index]);
    pick.title = `Mark ${label.name} (${label.number})`;
    pick.setAttribute("aria-pressed", isActive);
    pick.setAttribute("aria-label", `Mark label ${label.number}, ${label.name}`);
    pick.onclick = () => this.choose(index);
    const name = document.createElement("input");
    name.type = "text";
    name.value = label.name;
    name.maxLength = 64;
    name.setAttribute("aria-label", `Name of label ${label.number}`);
    name.onchange = () => { label.name = name.value.trim() || `object ${label.number}`; };
    name.onfocus = () => { if (this.study.active !== index) { this.study.active = index; this.markActive(); } };
    const voxels = document.createElement("span");
    voxels.className = "count";
    voxels.textContent = this.amount(count);
    voxels.title = `${count} voxels`;
    const shown = document.createElement("input");
    shown.type = "checkbox";
    shown.checked = label.isShown;
    shown.title = "Show";
    shown.setAttribute("aria-label", `Show label ${label.number}`);
    shown.onchange = () => { label.isShown = shown.checked; this.showLabels(); };
    row.append(pick, name, voxels, shown);
    return row;
  }

  markActive() {
    [...$("labels").children].forEach((row, index) => {
      row.classList.toggle("active", index === this.study.active);
      row.firstChild.setAttribute("aria-pressed", index === this.study.active);
    });
    $("undo").disabled = !this.label.steps.length;
  }

  /** So many voxels as millilitres, or as pixels of a picture. */
  amount(count) {
    const spacing = this.study.info.spacing_mm;
    if (!this.scene.isVolume || !spacing) return count ? `${count}` : "–";
    const ml = count * spacing.reduce((product, one) => product * one, 1) / 1000;
    return count ? `${ml < 10 ? ml.toFixed(2) : ml.toFixed(0)} ml` : "–";
  }

  showMarks() {
    if (!this.study) return;
    this.scene.draft = null;
    this.scene.marks = this.study.labels.flatMap((label, index) =>
      label.isShown && !this.isHidden ? label.steps.map((step) => ({ ...step, colour: css(this.colours[index]), ink: inkOn(this.colours[index]) })) : []);
    this.scene.drawMarks();
  }

  // what is seen

  setTool(name) {
    this.tool = name;
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-checked", button.dataset.tool === name);
    }
    $("stage").classList.toggle("marking", name !== "move" && this.study !== null);
  }

  setView(name) {
    this.scene.setView(name);
    $("view").value = name;
  }

  showSlice() {
    const bar = $("slice-bar");
    bar.hidden = !this.study || !this.scene.isVolume || this.scene.view === "3D";
    const isVolume = Boolean(this.study && this.scene.isVolume);
    if ($("stage").classList.contains("volume") !== isVolume) {
      $("stage").classList.toggle("volume", isVolume);
      this.scene.nv.resizeListener(); // at once, not after the next frame: places on the screen moved
    }
    if (bar.hidden) return;
    const array = this.scene.across();
    const at = this.scene.place[array];
    $("slice").max = this.scene.shape[array] - 1;
    $("slice").value = at;
    $("slice-text").textContent = `${at + 1} / ${this.scene.shape[array]}`;
  }

  hideMasks() {
    this.isHidden = !this.isHidden;
    this.showLabels();
    this.note(this.isHidden ? "masks are hidden (M shows them)" : "");
  }

  note(text) {
    $("answer").textContent = text;
  }

  say(text) {
    $("message-text").textContent = text;
    $("message").hidden = !text;
  }

  showBusy(text) {
    clearInterval(this.clock);
    const start = performance.now();
    const tell = () => {
      const passed = Math.floor((performance.now() - start) / 1000);
      $("busy").textContent = passed > 1 ? `${text} … ${passed} s` : `${text} …`;
    };
    tell();
    if (text) this.clock = setInterval(tell, 1000);
    $("busy").hidden = !text;
    $("stage").classList.toggle("working", Boolean(text));
  }

  fillAbout() {
    const { model, note, weights, figures, answer_within_s: within, card } = this.about;
    const percent = (value) => `${(100 * value).toFixed(1)} %`;
    const rows = [["Model", model], ["Weights", [note, weights.note || weights.source].filter(Boolean).join("; ")]];
    rows.push(["Licence", this.about.licence]);
    if (weights.sha256) rows.push(["SHA-256", weights.sha256]);
    if ("trained" in weights) rows.push(["Trained", weights.trained ? "yes" : "no: its masks mean nothing"]);
    if (figures.images) {
      rows.push(["Gate", `on ${figures.images} images, ${figures.objects} objects, by ${figures.backend}`]);
      if (figures.dice) rows.push(["Dice with the truth", `${percent(figures.dice)} (PyTorch ${percent(figures.dice_reference)})`]);
      if (figures.mask_agreement_mean) rows.push(["Agreement with PyTorch", percent(figures.mask_agreement_mean)]);
    } else {
      rows.push(["Gate", "no figures: not an export of this library"]);
    }
    rows.push(["Answers", `within about ${within} s; the next prompt goes on`]);
    $("about-list").replaceChildren(...rows.flatMap(([name, text]) => {
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = name;
      value.textContent = text;
      return [term, value];
    }));
    $("card").textContent = card;
    $("card-box").hidden = !card;
  }

  askKey(wasWrong) {
    const dialog = $("key-dialog");
    $("key-text").textContent = wasWrong ? "That key is wrong." : "This server asks for a key.";
    if (!dialog.open) dialog.showModal();
    return new Promise((done, failed) => {
      dialog.oncancel = () => failed(new ServerError(401, "This server asks for a key: reload the page to enter it."));
      $("key-form").onsubmit = (event) => {
        event.preventDefault();
        const key = $("key").value.trim();
        $("key").value = "";
        dialog.close();
        done(key);
      };
    });
  }

  // saving

  save() {
    const format = $("format").value;
    const objects = this.study.labels.filter((_, index) => this.scene.counts[index])
      .map(({ number, name }) => ({ label: number, name }));
    return this.queue("Saving", async () => {
      const answer = await this.asking(() => this.server.json("study/save", { format, objects }));
      const name = stemOf(this.study.name) + this.study.info.formats[format];
      download(await answer.blob(), name);
      this.isUnsaved = false;
      this.note(`saved ${name}`);
    });
  }

  listen() {
    const on = (id, action, kind = "click") => $(id).addEventListener(kind, action);
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => this.setTool(button.dataset.tool));
    }
    on("open-file", () => $("file").click());
    on("open-folder", () => $("folder").click());
    on("open-again", () => { $("welcome").hidden = false; });
    for (const id of ["file", "folder"]) {
      on(id, () => {
        const files = [...$(id).files];
        $(id).value = "";
        if (files.length) this.open(files);
      }, "change");
    }
    on("undo", () => this.undo());
    on("clear", () => this.clear());
    on("new-label", () => this.addLabel());
    on("save", () => this.save());
    on("message-close", () => this.say(""));
    on("help-open", () => $("help").showModal());
    on("about-open", () => $("about").showModal());
    on("view", () => this.setView($("view").value), "change");
    on("slice", () => {
      const place = this.scene.place;
      place[this.scene.across()] = Number($("slice").value);
      this.scene.place = place;
    }, "input");
    on("opacity", () => this.scene.setOpacity($("opacity").value / 100), "input");
    on("window", async () => {
      const value = $("window").value;
      await this.open(this.study.files, { window: value === "file" ? value : JSON.parse(value || "null") });
      const { window } = this.study; // another one than was chosen, if that was refused
      $("window").value = Array.isArray(window) ? JSON.stringify(window) : window ?? "";
    }, "change");
    this.scene.nv.drawOpacity = 0.5;
    addEventListener("beforeunload", (event) => { if (this.isUnsaved) event.preventDefault(); });
    const stage = $("stage");
    for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
    addEventListener("dragover", () => stage.classList.add("over"));
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) stage.classList.remove("over"); });
    addEventListener("drop", (event) => {
      stage.classList.remove("over");
      const reading = dropped(event.dataTransfer);
      this.queue("Reading", async () => { const files = await reading; if (files.length) this.open(files); });
    });
    listenToPointer(this, stage, $("overlay"));
    listenToKeys(this);
  }
}

const FORMAT_NAMES = {
  nifti: "NIfTI",
  "dicom-seg": "DICOM-SEG",
  rtstruct: "RTSTRUCT",
  png: "PNG",
  npz: "NumPy",
};
const VIEW_NAMES = { axial: "axial", coronal: "coronal", sagittal: "sagittal", four: "four views", "3D": "3D" };

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

export const app = new App();
app.start();
