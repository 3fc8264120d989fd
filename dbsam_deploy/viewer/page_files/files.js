// Files that the user chose or dropped → one body for the server.

/** All files of a drop, those in folders too. */
export async function dropped(transfer) {
  const entries = [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  const found = [];
  for (const entry of entries) await collect(entry, found);
  return found;
}

async function collect(entry, found) {
  if (!entry) return;
  if (entry instanceof File) {
    found.push(entry);
  } else if (entry.isFile) {
    found.push(await new Promise((done, failed) => entry.file(done, failed)));
  } else if (entry.isDirectory) {
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) break;
      for (const one of some) await collect(one, found);
    }
  }
}

/** What the user meant: no hidden files, and no list of a DICOM medium. */
export function meant(files) {
  return [...files].filter((file) => !file.name.startsWith(".") && file.name.toUpperCase() !== "DICOMDIR");
}

/** A name for what was opened: the file's, or its folder's. */
export function nameOf(files) {
  if (files.length === 1) return files[0].name;
  const folder = (files[0].webkitRelativePath || "").split("/")[0];
  return folder || `${files.length} files`;
}

/** The name without what says its kind, for files that are saved. */
export function stemOf(name) {
  return name.replace(/\.(nii\.gz|nii|npz|dcm|dicom|png|jpe?g|tiff?|bmp|webp)$/i, "").replace(/[^\w.-]+/g, "_") || "image";
}

/** The body: a number of four bytes, so much JSON, then file by file. No name is sent. */
export function packed(files, fields) {
  const head = new TextEncoder().encode(JSON.stringify({ ...fields, sizes: files.map((file) => file.size) }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, head.length, true);
  return new Blob([length, head, ...files]);
}

/** A server's words with the user's own names for files. */
export function named(text, files) {
  return text.replace(/file_(\d+)(\.[a-z.]+)?/g, (whole, number) => files[number - 1]?.name ?? whole);
}

export async function gzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Response(stream).blob();
}

/** Give the user a file. */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
