// Images of the question that is being written: chosen, dropped or pasted.

let images = [];
const list = document.getElementById("images");
const template = document.getElementById("image");

export const current = () => images;

export function set(next) {
  images = next;
  list.replaceChildren(...images.map(item));
}

// Adds image files in their order; returns the names of the files that are none.
export async function add(files) {
  const all = [...files];
  const read = await Promise.all(all.filter(isImage).map(async (file) => ({ name: file.name, url: await dataUrl(file) })));
  set([...images, ...read]);
  return all.filter((file) => !isImage(file)).map((file) => file.name);
}

const isImage = (file) => file.type.startsWith("image/");

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function item(image) {
  const element = template.content.cloneNode(true).firstElementChild;
  Object.assign(element.querySelector("img"), { src: image.url, alt: image.name });
  const button = element.querySelector("button");
  button.setAttribute("aria-label", `Remove ${image.name}`);
  button.addEventListener("click", () => {
    set(images.filter((other) => other !== image));
    document.getElementById("question").focus();
  });
  return element;
}
